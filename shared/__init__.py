"""What all papers share: claims and verdicts, workloads, devices, measurement, data, training, reports. Imports no paper."""
