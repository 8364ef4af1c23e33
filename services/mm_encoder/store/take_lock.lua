-- Take the lock of a key, unless another living replica owns it.
-- KEYS: locks
-- ARGV: key, replica, prefix of lease keys
-- Returns 1 if the replica owns the lock now.
local owner = redis.call('HGET', KEYS[1], ARGV[1])
if owner and owner ~= ARGV[2] and redis.call('EXISTS', ARGV[3] .. owner) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
