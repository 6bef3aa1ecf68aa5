from harness import arguments, hand_over, open_data, secret

open_data()
hand_over(secret("validation", arguments["data"], arguments["data"] + "/.."))
