"""P-DARTS (Chen et al. 2019, arXiv 1904.12760): the genotype found on CIFAR-10."""

from immunity_lib.baselines.cells import Edge, GenotypeNetwork

NORMAL = (
    (Edge("skip_connect", 0), Edge("dil_conv_3x3", 1)),
    (Edge("skip_connect", 0), Edge("sep_conv_3x3", 1)),
    (Edge("sep_conv_3x3", 1), Edge("sep_conv_3x3", 3)),
    (Edge("sep_conv_3x3", 0), Edge("dil_conv_5x5", 4)),
)
REDUCTION = (
    (Edge("avg_pool_3x3", 0), Edge("sep_conv_5x5", 1)),
    (Edge("sep_conv_3x3", 0), Edge("dil_conv_5x5", 2)),
    (Edge("max_pool_3x3", 0), Edge("dil_conv_3x3", 1)),
    (Edge("dil_conv_3x3", 1), Edge("dil_conv_5x5", 3)),
)


class PDarts(GenotypeNetwork):
    normal, reduction = NORMAL, REDUCTION
