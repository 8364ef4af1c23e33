-- Create a record and its work entry.
-- KEYS: record, stream
-- ARGV: request, gateway, v, m, id of the request, k
-- requires: add_entry
-- requires: note_entry
local entry = add_entry(KEYS[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
redis.call('HSET', KEYS[1], 'request', ARGV[1], 'epoch', '0', 'gateways', ARGV[2])
note_entry(KEYS[1], KEYS[2], entry)
