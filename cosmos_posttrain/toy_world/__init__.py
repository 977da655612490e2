"""A small world, rendered to mp4 with its truth: unlimited clips for proofs on the CPU. No torch.

Flows in: settings and a seed. Flows out: a folder of clips in the layout of the robot data
(``videos/SPLIT/ID/rgb.mp4``, ``annotation/SPLIT/ID.json``), and the truth of every frame.

    settings, seed, number --scene--> objects and their motion --render--> frames, what is visible
        --write--> mp4, annotation, truth
"""
