#!/bin/sh
# What `docker run IMAGE WORD ARGUMENT...` starts. The folder mounted at /results is the only one
# that is written to, so that all else may be read-only.
set -eu
project=$(dirname "$(dirname "$(readlink -f "$0")")")
results=/results

help() {
    cat <<'END'
usage: docker run --rm --gpus all -v "$PWD/results:/results" IMAGE WORD ARGUMENT...

  reproduce  make every table and figure of a preset (the default): reproduce --preset smoke
  lab        open the notebooks in JupyterLab; add -p 127.0.0.1:8888:8888 before IMAGE
  papermill  run one notebook: papermill notebooks/02_training.ipynb /results/out.ipynb
  plan       print what a preset would cost: plan --preset paper
  status     print how far a preset is: status --preset smoke
  site       make the results of a preset a folder of plain HTML: site --preset smoke
  test       run the tests that take seconds; more arguments go to pytest

Tables, figures, weights and notebooks appear in the folder that is mounted at /results.
END
}

word=${1:-reproduce}
[ $# -eq 0 ] || shift
case $word in
    reproduce | lab | papermill | plan | status | site | test) ;;
    --help | -h | help) help; exit 0 ;;
    *)
        echo "error: unknown word '$word'; these are known:" >&2
        help >&2
        exit 2
        ;;
esac

# Caches and settings of Jupyter, matplotlib, Snakemake and Triton all follow HOME
if [ -d "$results" ] && [ -w "$results" ]; then
    HOME=$results/.home
    mkdir -p "$HOME/tmp"
    cd "$results"
elif { [ "$word" = plan ] || [ "$word" = test ]; } && HOME=$(mktemp -d 2> /dev/null); then
    : # they leave nothing behind
else
    cat >&2 <<END
error: no folder is mounted at $results that user $(id -u) may write to. Make one, and run with it:
  mkdir -p results
  docker run --user "\$(id -u):\$(id -g)" -v "\$PWD/results:/results" ... $word
END
    exit 2
fi
[ -w /tmp ] || export TMPDIR="$HOME/tmp"
export HOME USER="${USER:-immunity}" HYPOTHESIS_STORAGE_DIRECTORY="$HOME/.hypothesis"
# Its default is below /tmp, where docker's tmpfs forbids what torch.compile builds to run
export TORCHINDUCTOR_CACHE_DIR="$HOME/.cache/torchinductor"

case $word in
    reproduce)
        exec python -m study.graph.run --output "$results" "$@"
        ;;
    status)
        exec python -m study.graph.status --output "$results" "$@"
        ;;
    site)
        exec python "$project/docs/build_site.py" --output "$results" "$@"
        ;;
    plan)
        exec python -m study.graph.plan "$@"
        ;;
    papermill)
        cd "$project"
        exec python -m papermill --cwd "$results" -p output_folder "$results" "$@"
        ;;
    lab)
        # Copies that can be saved, with their results beside them
        mkdir -p notebooks
        for notebook in "$project"/notebooks/*.ipynb; do
            copy=notebooks/$(basename "$notebook")
            [ -e "$copy" ] || sed 's|output_folder = \\"\\"|output_folder = \\"/results\\"|' \
                "$notebook" > "$copy"
        done
        exec jupyter lab --ip=0.0.0.0 --no-browser \
            --LabApp.default_url=/lab/tree/notebooks/05_heatmaps.ipynb "$@"
        ;;
    test)
        cd "$project"
        exec python -m pytest -m "not slow" -ra -p no:cacheprovider "$@"
        ;;
esac
