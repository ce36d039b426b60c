"""The one-replica Control deployment with its CentralScheduler and DriftMonitor actors."""
