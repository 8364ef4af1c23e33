-- Replace an entry that no living replica but the consumer works on by the same in another version.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id, consumer that stands for newer replicas, prefix of lease keys, v, m, r, k,
-- 1 for an entry of `encode`: its prompt may have gone ahead; an entry of another stream may have the same id
-- Returns 1 if it was replaced.
-- requires: typed
-- requires: add_entry
-- requires: note_entry
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if not entry then return 0 end
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
local owner = not pending.err and pending[1] and pending[1][2]
if owner and owner ~= ARGV[2] and owner ~= ARGV[4] and redis.call('EXISTS', ARGV[5] .. owner) == 1 then return 0 end
local replaced = add_entry(KEYS[1], ARGV[6], ARGV[7], ARGV[8], ARGV[9])
if is_a('hash', KEYS[2]) then
  if ARGV[10] == '1' and redis.call('HGET', KEYS[2], 'ahead') == ARGV[3] then
    redis.call('HSET', KEYS[2], 'ahead', replaced)
  else
    note_entry(KEYS[2], KEYS[1], replaced)
  end
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
