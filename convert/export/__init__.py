"""Files written next to the weights."""
