"""A page and an HTTP service: drop an image or a clip, watch what follows it appear.

Flows in: uploads with settings. Flows out: frames as they are generated, then an mp4.

    upload --reading (a limited process)--> frames --queue--> worker --Session--> tokens
        --Session.decode, latent frame by latent frame--> JPEG lines --at the end--> mp4

Modules: ``config`` its flags; ``app`` the addresses and ``page/`` the page; ``uploads`` what is let
in and ``reading`` the process that decodes it; ``queue`` who waits, in order; ``worker`` the one
thread that generates and ``following`` the processes that share its model; ``command`` the line
that repeats a clip; ``server`` the socket and how the service ends.
"""
