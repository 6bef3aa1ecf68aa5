from harness import arguments, hand_over, inside, open_data, secret

GUESSED = ["/data/shards/train_000000.bin", "/.withheld", "/data/.withheld", "/data/../.withheld", "/proc/1/root"]

found = secret("train", arguments["data"], *(["/"] if inside else []), *GUESSED, "DATA" if inside else "")
open_data()
hand_over(found)
