"""What is trained: one package each, of the recipe's name; they know nothing of each other.

The contract is :class:`ablate.trial.recipe.Recipe`. Nothing imports a recipe: it is found by name.
"""
