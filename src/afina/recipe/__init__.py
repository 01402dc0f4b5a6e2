"""What the user wants: the recipe's schema, its reading with line numbers, its cross-field rules. Loads no torch."""
