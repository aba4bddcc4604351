"""Workers in processes of their own, on this machine or on several, by Ray, which is imported here alone.

``cluster`` starts Ray or joins one that runs, ``seats`` starts the processes and hears what they say, by
``line`` a process says it and is told. None of them knows what is worked on.
"""
