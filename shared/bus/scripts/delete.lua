-- Delete keys.
-- KEYS: shards, key...
-- ARGV: fence
-- requires: fence
for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
