"""The locked side: seal what a run left behind, judge it, serve candidate models to the judge."""
