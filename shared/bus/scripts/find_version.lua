-- Look for entries of some versions in a page of a stream.
-- KEYS: stream
-- ARGV: id after which the page begins, '-' at first; entries of a page; version...
-- Returns {1 if there is one, id of the page's last entry or '' if no more follow}.
local versions = {}
for i = 3, #ARGV do versions[ARGV[i]] = true end
local from = ARGV[1] == '-' and '-' or '(' .. ARGV[1]
local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[2])
for _, entry in ipairs(page) do
  if entry[2][1] == 'v' and versions[entry[2][2]] then return {1, ''} end
end
return {0, #page == tonumber(ARGV[2]) and page[#page][1] or ''}
