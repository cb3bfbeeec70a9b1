"""An RTSP server for tests, run by the system's Python, which has GStreamer's bindings.

`rtsp_server.py PORT live|record|FILE [USER:PASSWORD]`: `live` serves a moving picture, an MP4 file is served once per client, `record FILE`
takes what a client publishes and writes it as MPEG-TS. It prints `ready` when clients can connect.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

LIVE = (
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=180,framerate=25/1 "
    "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! rtph264pay name=pay0 pt=96 config-interval=1 )"
)
FILE = '( filesrc location="{}" ! qtdemux ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=1 )'
RECORD = '( rtph264depay name=depay0 ! h264parse ! mpegtsmux ! filesink location="{}" )'


def require_login(server, factory, login):
    user, password = login.split(":")
    auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    for right in ("access", "construct"):
        permissions.add_permission_for_role("viewer", f"media.factory.{right}", True)
    factory.set_permissions(permissions)


def main(port, kind, *rest):
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
    factory = GstRtspServer.RTSPMediaFactory()
    if kind == "record":
        factory.set_transport_mode(GstRtspServer.RTSPTransportMode.RECORD)
        factory.set_launch(RECORD.format(rest[0]))
    else:
        factory.set_launch(LIVE if kind == "live" else FILE.format(kind))
        # A pipeline for each client: a shared one would stand still for all while one client does not read.
        factory.set_shared(False)
        if rest:
            require_login(server, factory, rest[0])
    server.get_mount_points().add_factory("/cam", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


main(*sys.argv[1:])
