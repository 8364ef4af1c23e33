-- Release the lock of a key, and broadcast the release.
-- KEYS: locks, control
-- ARGV: key, replica, length of control, v, m
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'v', ARGV[4], 'm', ARGV[5])
