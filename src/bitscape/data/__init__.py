"""Images in, batches out: data sets, proxy datasets and the batches that networks see."""
