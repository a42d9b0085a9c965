"""The Hypothesis profile of mutation testing: thousands of short runs, whose failures need no smallest example."""

import hypothesis

hypothesis.settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, max_examples=3, phases=[hypothesis.Phase.generate]
)
