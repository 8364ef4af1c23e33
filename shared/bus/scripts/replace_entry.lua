-- Replace an entry that no living replica but the consumer works on by the same in another version.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id, consumer that stands for newer replicas, prefix of lease keys, v, m, r
-- Returns 1 if it was replaced.
-- requires: typed
-- requires: note_entry
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if not entry then return 0 end
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
local owner = not pending.err and pending[1] and pending[1][2]
if owner and owner ~= ARGV[2] and owner ~= ARGV[4] and redis.call('EXISTS', ARGV[5] .. owner) == 1 then return 0 end
local replaced = redis.call('XADD', KEYS[1], '*', 'v', ARGV[6], 'm', ARGV[7], 'r', ARGV[8])
if is_a('hash', KEYS[2]) then note_entry(KEYS[2], KEYS[1], replaced) end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
