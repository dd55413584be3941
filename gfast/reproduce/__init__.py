# SPDX-License-Identifier: Apache-2.0
"""Studies from recipes: `recipe.py` reads one, `plan.py` makes its steps, `steps.py` runs those that are to be run,
`work.py` is what a step does, `summary.py` what came out, `page.py` shows it.
"""
