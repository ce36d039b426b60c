"""`mace demo drift`: the preferred style changes twice; which policy follows, how fast, and at what cost?"""
