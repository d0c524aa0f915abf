"""The mathematics of diffusion: schedule, process, objectives, samplers. Needs torch only."""
