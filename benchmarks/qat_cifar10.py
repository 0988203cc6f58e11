"""qat-cifar10: does a searched policy beat uniform bits after training? ResNet-20 on CIFAR-10, three BitOps budgets.

    python -m benchmarks.qat_cifar10 [--images 20000] [--epochs 3] [--seeds 3] [--threads 1] [--part 0/2]

Every row shares quantizer (LSQ), recipe, data order and budget. Searches see a proxy of 4 % of the training images. `--part i/n` does every
n-th missing run, so that several processes can share the work.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.common import RESULTS, bits_of, dataset, proxy_images, record, test_batches
from bitscape.data.batches import Batches
from bitscape.engine import Cosine, Sgd, evaluate, train
from bitscape.policy import LayerBits, Policy, uniform_policy
from bitscape.quant.convert import calibrate, quantize, recalibrate_norms
from bitscape.report.records import missing, read_runs
from bitscape.search.fisher import Fisher
from bitscape.search.hawq import Hawq
from bitscape.search.kl import Kl
from bitscape.search.local import Local
from bitscape.search.problem import SearchProblem
from bitscape.search.random_policy import RandomPolicy
from bitscape.search.uniform import Uniform
from bitscape.train.plain import Plain
from recipes.networks import WEIGHTS, load

NAME, NETWORK = "qat-cifar10", "resnet20"
KEYS = ("benchmark", "method", "variant", "budget", "epochs", "seed", "settings")
BUDGETS = {"w4a4": "bitops=w4a4", "w3a3": "bitops=w3a3", "2.5 bits": "bitops=6x"}
