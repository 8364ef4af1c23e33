-- Write a lease, and its name into the index. Both in one script: a Redis that loses its newest writes cannot keep a
-- lease without its name in the index.
-- KEYS: lease, index
-- ARGV: status, expiry in ms, name
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[3])
