-- Create a record and its work entry.
-- KEYS: record, stream
-- ARGV: request, gateway, v, m, id of the request
-- requires: note_entry
local entry = redis.call('XADD', KEYS[2], '*', 'v', ARGV[3], 'm', ARGV[4], 'r', ARGV[5])
redis.call('HSET', KEYS[1], 'request', ARGV[1], 'epoch', '0', 'gateways', ARGV[2])
note_entry(KEYS[1], KEYS[2], entry)
