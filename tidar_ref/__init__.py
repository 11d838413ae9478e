"""The TiDAR method (arXiv 2511.08923): backbone, masks, decode loop. Imports nothing of ours."""
