"""How Hypothesis draws its examples: the same ones in every run, none judged by the time it took on a busy machine."""

from hypothesis import HealthCheck, settings

EXAMPLES = settings(derandomize=True, max_examples=150, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
