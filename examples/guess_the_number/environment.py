"""The game: guess a number from 1 to 5 in three turns. After a guess the player learns whether it is less or greater."""

from iiverl_core.environment import Turn


class Environment:
    """One game. It is worth 1 if it ends with a hit; before, a guess that can be right is worth a tenth."""

    def reset(self, row):
        """Take the number from the row; the row's prompt, "?", is the first message."""
        self.number, self.low, self.high = row["ground_truth"], 1, 5
        self.earned = 0.0

    def step(self, message):
        """Answer a guess: `<` if the number is less, `>` if it is greater, `?` if the guess is no number."""
        if not message["content"].isdecimal():
            return Turn("?", info={"valid": 0.0, "hit": 0.0})
        guess = int(message["content"])
        if guess == self.number:
            return Turn(reward=1.0 - self.earned, done=True, info={"valid": 1.0, "hit": 1.0})
        reward = 0.1 if self.low <= guess <= self.high else 0.0
        self.earned += reward
        if self.number < guess:
            self.high = min(self.high, guess - 1)
        else:
            self.low = max(self.low, guess + 1)
        return Turn("<" if self.number < guess else ">", reward=reward, info={"valid": 1.0, "hit": 0.0})
