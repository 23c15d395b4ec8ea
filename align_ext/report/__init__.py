"""The report of a study, from its files alone: statistics, tables, figures, one page. Needs no model and no GPU."""
