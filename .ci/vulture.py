# Names that vulture takes for unused because others call or read them.
# Operations and Properties are exempt by their decorators, see .ci/run.

# xml.parsers.expat calls the handlers and reads the switch
buffer_text
StartElementHandler
EndElementHandler
CharacterDataHandler
StartDoctypeDeclHandler

# socketserver and http.server call and read these of a server ...
daemon_threads
block_on_close
request_queue_size
service_actions
shutdown_request
server_bind
server_name
handle_error

# ... and these of a handler
protocol_version
setup
handle
finish
do_POST
log_message
