"""Has something changed, how alarming is it, and how much training does it call for?"""
