"""`python -m iiverl_reward_client.server`."""

import sys

from iiverl_reward_client.server.command import main

sys.exit(main())
