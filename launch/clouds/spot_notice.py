"""python -m launch.clouds.spot_notice COMMAND …: run a command, and send it SIGTERM when the cloud wants the machine back.

The machine's metadata service is asked every five seconds: on AWS a notice comes two minutes before, on Google Cloud with the
preemption, some 30 s before the end. Where neither service answers, it only runs the command.
"""

import http.client
import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from urllib.parse import urlsplit

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError

PERIOD_S = 5.0
"""Time between two questions."""
_ANSWER_S = 2.0  # time for an answer: the service is on the machine


def aws_notice(endpoint: str) -> bool:
    """Return True where AWS will stop or end this spot machine. Raises OSError where no such service answers."""
    _, token = _ask(endpoint, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    status, _ = _ask(endpoint, "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    return status == 200


def google_notice(endpoint: str) -> bool:
    """Return True where Google Cloud has preempted this machine. Raises OSError where no such service answers."""
    path = "/computeMetadata/v1/instance/preempted"
    status, answer = _ask(endpoint, "GET", path, {"Metadata-Flavor": "Google"})
    return status == 200 and answer.strip() == "TRUE"


def endpoints() -> tuple[str, str]:
    """Addresses of the services of AWS and Google, as their own clients find them."""
    aws = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    google = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    return aws, f"http://{google}"


def noticed() -> str:
    """Name the cloud that wants this machine back; "" where none does."""
    aws, google = endpoints()
    for cloud, notice, endpoint in (("AWS", aws_notice, aws), ("Google Cloud", google_notice, google)):
        try:
            if notice(endpoint):
                return cloud
        except (OSError, http.client.HTTPException):
            continue  # another cloud, or none
    return ""


def _ask(endpoint: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    place = urlsplit(endpoint)
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=_ANSWER_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(4096).decode("latin-1")
    finally:
        connection.close()


def main() -> None:
    """Exit with the command's exit code, or with 128 + N where signal N has ended it. Raises `UserError`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before the command was there

    def forward(number: int, frame: FrameType | None) -> None:
        if child:
            child.send_signal(number)
        else:
            early.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:  # the command ignores it, too, as under nohup
            signal.signal(number, forward)
    try:
        child = subprocess.Popen(sys.argv[1:])
    except OSError as error:
        raise UserError(f"COMMAND: {sys.argv[1]} cannot be run ({error.strerror})") from None
    for came in early:
        child.send_signal(came)
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _watch(child: "subprocess.Popen[bytes]") -> None:
    while child.poll() is None:
        if cloud := noticed():
            print(f"{cloud} wants this machine back: the run saves and ends", flush=True)
            child.send_signal(signal.SIGTERM)
            return
        threading.Event().wait(PERIOD_S)


if __name__ == "__main__":
    run_command(main)
