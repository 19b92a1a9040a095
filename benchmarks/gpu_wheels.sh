#!/bin/sh
# Fill a folder with what a machine with a GPU, JAX, PyTorch and no network lacks (Python 3.12):
#   benchmarks/gpu_wheels.sh .whl
set -eu
exec "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
  --python-version 3.12 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest "$1" \
  ml_collections==1.1.0 pycocotools==2.0.11 grain==0.2.18 array_record==0.8.6 portpicker==1.6.0
