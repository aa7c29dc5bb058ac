"""Command lines with damaged, hostile or foreign inputs, each of which ends in a clear refusal."""
