"""Property tests without a clock, which would make them fail on a busy machine, and without files of their own."""

from hypothesis import HealthCheck, settings

settings.register_profile("postproc", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("postproc")
