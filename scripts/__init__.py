"""The scripts as a package, arb_scripts, so that `arb` finds them where the repo is not."""
