"""The Megatron backend's place. It is not there yet: nothing is offered under `iiverl.backends`."""
