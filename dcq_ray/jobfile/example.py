"""The shortest job worth running, as `dcq-ray run --help` shows it."""

from __future__ import annotations

EXAMPLE_JOB = """\
name: digits-w1                          # the run directory is runs/digits-w1 unless storage.run_dir says otherwise
teacher:
  model: dcq_ray:lenet                   # or torchvision:resnet18, or package.module:function of your own
  args: {in_channels: 1, image_size: 32}
  fit: {epochs: 20, lr: 0.001, optimizer: adam}   # there are no weights yet: train it first
data:
  dataset: digits                        # 1,797 handwritten digits that come with scikit-learn
  image_size: [32, 32]
sections: {count: 3}                     # three sections, trained at the same time
quantize:
  weights: {scheme: dorefa, bits: 1}     # 1 to 8
  first_last_bits: 8                     # the first and the last layer keep more
train: {epochs: 10, optimizer: adam, lr: 0.001}   # of every section
reduce: {max_drop: 2.0}                  # percentage points of top-1; exit code 3 beyond
seed: 0
"""
