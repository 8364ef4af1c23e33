-- Write a lease and its name in the index. One step: no loss of Redis's newest writes leaves a lease in no index.
-- KEYS: lease, index
-- ARGV: status, expiry in ms, name
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
