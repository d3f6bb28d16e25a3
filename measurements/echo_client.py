"""A client that trains nothing and sends back the model it received: what is left is NVFlare's own time."""

import nvflare.client as flare

flare.init()
while flare.is_running():
    global_model = flare.receive()
    flare.send(
        flare.FLModel(params=global_model.params, metrics={"train_loss": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 1})
    )
