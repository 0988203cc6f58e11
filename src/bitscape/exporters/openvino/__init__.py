"""OpenVINO IR files, and the check that OpenVINO computes them as integers say it must."""
