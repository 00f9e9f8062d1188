"""One static page that shows a campaign: curves, lineage, statuses, every node."""
