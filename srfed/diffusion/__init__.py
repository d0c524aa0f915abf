"""The mathematics of DDPM: noise schedule, forward process and loss, samplers. Needs torch only."""
