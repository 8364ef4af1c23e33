-- Replace fields of a record that nobody has changed meanwhile.
-- KEYS: record
-- ARGV: (field, value before, value after)...
for i = 1, #ARGV, 3 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2]) end
end
