"""AdvRush (Mok et al. 2021, arXiv 2108.01289): a genotype found for its smooth input loss."""

from immunity_lib.baselines.cells import Edge, GenotypeNetwork

NORMAL = (
    (Edge("sep_conv_3x3", 1), Edge("sep_conv_3x3", 0)),
    (Edge("sep_conv_5x5", 0), Edge("sep_conv_3x3", 1)),
    (Edge("sep_conv_3x3", 1), Edge("sep_conv_3x3", 0)),
    (Edge("skip_connect", 0), Edge("sep_conv_3x3", 1)),
)
REDUCTION = (
    (Edge("sep_conv_3x3", 0), Edge("sep_conv_3x3", 1)),
    (Edge("skip_connect", 0), Edge("dil_conv_3x3", 2)),
    (Edge("skip_connect", 0), Edge("avg_pool_3x3", 1)),
    (Edge("skip_connect", 0), Edge("skip_connect", 2)),
)


class AdvRush(GenotypeNetwork):
    normal, reduction = NORMAL, REDUCTION
