"""What a call is: its nouns, its refusals, which keys a query may see, and the threshold. Knows no backend."""
