"""How good is it: tasks, metrics with intervals, and the page that shows them."""
