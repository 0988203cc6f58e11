"""From a network, a few images and a budget to a policy: the problem, the exact allocation, and one file per method."""
