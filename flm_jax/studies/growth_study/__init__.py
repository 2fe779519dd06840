"""Does growth pay? A study with the controls that decide it (docs/study).

Read `config.py` (what is compared), `histories.py` (what a trial trains), `phases.py` (the trials
of each phase), `training.py` (one piece of training), `pool.py` (who trains what, and when), then
`analysis.py` (what the results say, fixed beforehand) and `report.py`.
"""
