"""Models measured and compared: the benchmark, stage 5, and trainings at equal budgets, stage 6.

`peers` builds the models of other toolkits, `published` holds what papers tell of theirs.
`benchmark` has `measure` take each figure in a process of its own, and `page` write them down;
`comparison` trains contenders, which `milestones` looks at on their way.
"""
